"""The words of the house: requests, tensors, specs, errors. Knows no other room."""
