"""A shrunk copy of a run on every legal layout, compared with one rank: `lmscale verify`."""
