"""Pictures step by step: pictures of many requests share each forward of the model. Knows nothing of serving."""
