"""How calls in torchdiffeq's words are solved by our engine, or passed on."""
