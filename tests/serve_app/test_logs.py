"""A replica's log lines go where Serve's do."""

import logging

from ray import serve

from serve_app.logs import log_as_serve_does


def test_our_loggers_have_serves_handlers_and_level(monkeypatch):
    handler = logging.Handler()
    for name in ("ray.serve", "serve_app", "cluster"):
        monkeypatch.setattr(logging.getLogger(name), "handlers", [])
        monkeypatch.setattr(logging.getLogger(name), "level", logging.NOTSET)
    theirs = logging.getLogger("ray.serve")
    theirs.addHandler(handler)
    theirs.setLevel(logging.INFO)
    written = []
    handler.emit = written.append
    log_as_serve_does()
    assert logging.getLogger("serve_app").handlers == [], "this is no replica"
    monkeypatch.setattr(serve, "get_replica_context", lambda: None)
    log_as_serve_does()
    for module in ("serve_app.attempt", "cluster.group"):
        logging.getLogger(module).info("%s has ended", module)
    assert [record.name for record in written] == ["serve_app.attempt", "cluster.group"]
