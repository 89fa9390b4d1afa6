"""Auth: tenants, keys, leases of quota, the usage ledger, the revocation feed. Sees no prompt."""
