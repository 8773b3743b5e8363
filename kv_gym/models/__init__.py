"""All that touches a transformers model: loading, attention, hidden states, fingerprints, a second reading."""
