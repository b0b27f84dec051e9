"""Vector fields and the networks built around a solve."""
