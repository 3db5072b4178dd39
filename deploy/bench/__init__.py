"""`tandem bench`: what this machine can do, what Tandem does on it, and the ratio, measured in one run."""
