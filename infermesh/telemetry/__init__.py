"""Metrics, traces and logs of every service; each degrades to nothing where its library is absent.

Set up once per process by `infermesh.lifecycle.run`.
"""

from infermesh.telemetry import logs, metrics, tracing

__all__ = ["logs", "metrics", "tracing"]
