"""Tables that outlive the process: tenants, keys, usage, audit, configuration."""
