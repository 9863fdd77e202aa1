"""`outbox bench`: how fast the relay is on given servers or embedded ones, next to what the two servers allow.

Knows how to make a load and what to measure it against; what is compared is measured in the same round. Must not be
loaded by the relay or by an application.
"""
