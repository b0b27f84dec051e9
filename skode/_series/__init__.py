"""Irregular series: pandas and numpy on one side, ragged rows and tensors on the other.

No model is known here. `layout` is where X and y come in and predictions go out,
`history` sorts rows into series, `batch` makes tensors of them.
"""
