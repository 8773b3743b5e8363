"""Page policies, one file each: classic algorithms, oracles, engines' own, policies with predictions, learned ones."""
