"""TensorBoard's event files, read without TensorBoard."""

import struct

from tensorboardX.proto.event_pb2 import Event


def events(data: bytes) -> list:
    """The records of an event file: length, its check sum, content, its check sum."""
    found = []
    while data:
        (length,) = struct.unpack_from("<Q", data)
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found
