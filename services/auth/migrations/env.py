"""Runs migrations on the connection that `services.auth.migrate` holds."""

from alembic import context

context.configure(
    connection=context.config.attributes["connection"],
    render_as_batch=True,
    # the caller's transaction is the lock
    transactional_ddl=False,
)
context.run_migrations()
