"""The OpenAI API, as its SDK and its users' programs speak it."""
