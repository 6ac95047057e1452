"""Python models of `fairlead demo`, copied into its repository as `model.py`."""
