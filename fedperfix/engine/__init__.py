"""The federated engine: one resident model, states in tables, a round as a transaction."""
