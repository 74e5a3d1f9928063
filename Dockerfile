# The image of the example project: its worker and its billing service.
FROM python:3.11-slim-bookworm

WORKDIR /srv
COPY pyproject.toml README.md LICENSE ./
COPY celery_idem celery_idem
RUN pip install --no-cache-dir --disable-pip-version-check .
COPY example_project example_project

# The ledger's folder has to belong to the user before a volume is laid over it.
RUN useradd --system --no-create-home idem && mkdir /ledger && chown idem /ledger
USER idem

CMD ["celery", "-A", "example_project.app", "worker", "--loglevel", "INFO", "--hostname", "worker@%h"]
