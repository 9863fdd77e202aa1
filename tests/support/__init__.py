"""What the tests stand on: servers, relays, writers and their ledger, faults on purpose, and readers of documents.

Knows real servers and no test. Tests import from here alone: never from a conftest, never from each other.
"""
