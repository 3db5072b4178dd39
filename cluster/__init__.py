"""The words of the cluster: messages, configuration, errors, membership, RPC. Imports nothing of ours."""
