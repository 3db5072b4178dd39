"""`tandem doctor`: facts are gathered (machine, services, model_files), judged (checks) and shown (cli)."""
