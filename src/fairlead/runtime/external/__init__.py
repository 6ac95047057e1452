"""Engines of others as versions of our models: started as children or attached by URL, watched, and asked in OpenAI's protocol."""
