"""The hand on NATS: connections, streams as JetStream tells of them, messages read back, and batches with their acks.

Knows nats-py, TLS, credentials and JetStream's API. Must not decide what is to be done, and must not know PostgreSQL.
No other wing imports nats-py, but the demo and the benchmark, which stand in for applications.
"""
