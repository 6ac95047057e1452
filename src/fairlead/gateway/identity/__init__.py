"""Who asks: API keys, tokens of an OIDC issuer, client certificates."""
