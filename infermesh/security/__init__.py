"""Who speaks to whom in the mesh: identities, certificates, the allow-list, what is refused."""
