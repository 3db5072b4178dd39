"""Behaviour under load, over HTTP, of any OpenAI-compatible server."""
