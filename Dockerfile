# The relay and all other commands of outbox, without the servers of the demo.
FROM python:3.12-slim

COPY pyproject.toml README.md LICENSE /src/
COPY outbox /src/outbox
COPY migrations /src/migrations
RUN pip install --no-cache-dir /src \
 && rm -r /src \
 && useradd --system --uid 10001 --no-create-home outbox

# An outbox.toml that is mounted here is read.
WORKDIR /etc/outbox
USER outbox
ENTRYPOINT ["outbox"]
CMD ["--help"]
