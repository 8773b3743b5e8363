"""What policies score with: inputs, attention hits, neighbours, the block schedule."""
