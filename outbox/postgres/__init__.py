"""The hand on PostgreSQL: sessions, the relay's statements, and rows as domain values.

Knows SQL, psycopg, the session's settings and whose fault an error is. Must not decide what is to be done, and must not
know NATS.
"""
