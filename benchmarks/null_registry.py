"""A registry that stores nothing, to measure the limits of the load generator and of loopback.

    null_registry.py FILE

Prints its address. The kernel drops pushed bytes (Linux's MSG_TRUNC) and sends FILE for each pull.
Each connection has a thread.
"""

from __future__ import annotations

import os
import re
import socket
import sys
import threading

MIB = 1024**2
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)


def serve(connection: socket.socket, file: int, size: int) -> None:
    """Answer the requests of one connection."""
    unused = bytearray(MIB)
    with connection:
        while True:
            head = b""
            while b"\r\n\r\n" not in head:
                came = connection.recv(4096)
                if not came:
                    return
                head += came
            head, _, begun = head.partition(b"\r\n\r\n")
            found = _LENGTH.search(head)
            left = int(found[1]) - len(begun) if found else 0
            while left > 0:
                left -= connection.recv_into(unused, min(left, MIB), socket.MSG_TRUNC)
            if head.startswith(b"GET"):
                connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % size)
                position = 0
                while position < size:
                    position += os.sendfile(connection.fileno(), file, position, size - position)
            else:
                status = b"202 Accepted" if head.startswith(b"POST") else b"201 Created"
                answer = b"HTTP/1.1 %s\r\nLocation: /upload\r\nContent-Length: 0\r\n\r\n" % status
                connection.sendall(answer)


def main() -> None:
    with open(sys.argv[1], "rb") as stream, socket.create_server(("127.0.0.1", 0)) as listener:
        print(f"127.0.0.1:{listener.getsockname()[1]}", flush=True)
        size = os.fstat(stream.fileno()).st_size
        while True:
            connection, _ = listener.accept()
            arguments = (connection, stream.fileno(), size)
            threading.Thread(target=serve, args=arguments, daemon=True).start()


if __name__ == "__main__":
    main()
