"""Sends bytes between ranks: `python traffic.py SENDERS RECEIVERS MEGABYTES`, on every rank.

SENDERS and RECEIVERS are rank lists of one length such as 0,1 and 2,3, MEGABYTES one number or a list of that length;
all flows run at once. Rank 0 prints when each flow began and ended, in seconds of the machine's monotonic clock, as
JSON.
"""

from __future__ import annotations

import json
import os
import socket
import struct
import sys
import threading
import time

FIRST_PORT = 31000
MASTER = (os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]))
TIME = struct.Struct("d")

Times = dict[int, tuple[float, float]]  # flow -> start, end


def send(receiver: int, flow: int, size: int) -> None:
    node = receiver // int(os.environ["LOCAL_WORLD_SIZE"])
    with connect((f"10.77.0.{node + 1}", FIRST_PORT + flow)) as connection:
        connection.sendall(TIME.pack(time.monotonic()))
        connection.sendall(bytes(size))


def receive(listener: socket.socket, times: Times, flow: int, size: int) -> None:
    with listener.accept()[0] as connection:
        start = TIME.unpack(connection.recv(TIME.size, socket.MSG_WAITALL))[0]
        while chunk := connection.recv(1 << 20):
            size -= len(chunk)
    times[flow] = (start, time.monotonic())
    assert size == 0


def connect(address: tuple[str, int]) -> socket.socket:
    """A connection to `address`, tried for ten seconds: the other rank may still be starting."""
    deadline = time.monotonic() + 10
    while True:
        try:
            return socket.create_connection(address, timeout=60)
        except ConnectionRefusedError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.02)


def run_flows(senders: list[int], receivers: list[int], sizes: list[int]) -> Times:
    """This rank's part; returns the times of the flows it receives."""
    rank = int(os.environ["RANK"])
    times: Times = {}
    threads = []
    for flow, receiver in enumerate(receivers):
        if receiver == rank:
            listener = socket.create_server(("0.0.0.0", FIRST_PORT + flow))  # noqa: S104  the emulated network only
            threads.append(threading.Thread(target=receive, args=(listener, times, flow, sizes[flow])))
    for flow, (sender, receiver) in enumerate(zip(senders, receivers, strict=True)):
        if sender == rank:
            threads.append(threading.Thread(target=send, args=(receiver, flow, sizes[flow])))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return times


def main() -> None:
    senders, receivers = ([int(rank) for rank in text.split(",")] for text in sys.argv[1:3])
    rank, world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    hub = socket.create_server(("0.0.0.0", MASTER[1])) if rank == 0 else None  # noqa: S104
    sizes = [int(float(text) * 1e6) for text in sys.argv[3].split(",")]
    times = run_flows(senders, receivers, sizes if len(sizes) > 1 else sizes * len(senders))
    if hub is None:
        with connect(MASTER) as connection:
            connection.sendall(json.dumps(times).encode())
        return
    for _ in range(world_size - 1):
        connection, _ = hub.accept()
        with connection, connection.makefile() as file:
            times |= {int(flow): span for flow, span in json.load(file).items()}
    print(json.dumps([times[flow] for flow in range(len(senders))]))


if __name__ == "__main__":
    main()
