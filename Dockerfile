# The relay and all other commands of outbox, without the servers of the demo.
FROM python:3.12-slim AS build

RUN python -m venv --without-pip /opt/outbox
# First what changes rarely. Every file has its hash in the list, so that each build has the packages that were tested.
COPY docs/deploy/requirements.txt /src/
RUN pip --python /opt/outbox/bin/python install --no-cache-dir --no-deps --require-hashes -r /src/requirements.txt
COPY pyproject.toml README.md LICENSE /src/
COPY outbox /src/outbox
COPY migrations /src/migrations
RUN pip --python /opt/outbox/bin/python install --no-cache-dir --no-deps /src

FROM python:3.12-slim

LABEL org.opencontainers.image.title="outbox-relay" \
      org.opencontainers.image.description="Transactional outbox relay from PostgreSQL to NATS JetStream" \
      org.opencontainers.image.version="0.2.0" \
      org.opencontainers.image.licenses="Apache-2.0"
RUN groupadd --system --gid 10001 outbox \
 && useradd --system --uid 10001 --gid 10001 --no-create-home outbox
COPY --from=build /opt/outbox /opt/outbox
ENV PATH=/opt/outbox/bin:$PATH

# An outbox.toml that is mounted here is read.
WORKDIR /etc/outbox
USER 10001:10001
# No HEALTHCHECK: only the relay has something to ask, and only where it listens.
ENTRYPOINT ["outbox"]
CMD ["--help"]
