"""The composition root: `tandem serve`, `status` and `bench`. May import everything."""
