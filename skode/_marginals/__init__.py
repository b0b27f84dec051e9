"""Smooth maps of columns to normal scores; rows to white scores and back."""
