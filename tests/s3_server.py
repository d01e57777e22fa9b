"""A server on loopback that speaks S3 as a bucket does: conditional writes of one object have one winner."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from moto.moto_server.werkzeug_app import DomainDispatcherApplication, MotoRequestHandler, create_backend_app
from werkzeug.serving import make_server


@contextmanager
def s3_server(*, ignores_conditions: bool = False) -> Iterator[str]:
    """Yield the URL of the server. With `ignores_conditions` it overwrites in spite of If-None-Match, as some do."""
    moto = DomainDispatcherApplication(create_backend_app)
    writing = threading.Lock()

    def bucket(environ, start_response):
        if "HTTP_IF_NONE_MATCH" not in environ:
            return moto(environ, start_response)
        if ignores_conditions:
            del environ["HTTP_IF_NONE_MATCH"]
            return moto(environ, start_response)
        with writing:  # moto first looks for the object and then writes it: two writers could both find none
            return moto(environ, start_response)

    server = make_server("127.0.0.1", 0, bucket, threaded=True, request_handler=MotoRequestHandler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
