"""What policies share: inputs of learned scorers, attention hits, neighbours in the text, the schedule of blocks."""
