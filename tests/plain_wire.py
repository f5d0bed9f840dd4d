"""The wire format once more, in plain loops: what fedsparse.federation.exchange.wire.message is held against."""

import struct

ALL, BITMAP, FLAT, GAPS = range(4)
HEADER = 48
CRC_AT = 20


def leb128(number):
    out = []
    while number >= 128:
        out.append(128 + number % 128)
        number //= 128
    return bytes([*out, number])


def gap_bytes(positions):
    out, after = b"", 0
    for position in positions:
        out += leb128(position - after)
        after = position + 1
    return out


def bitmap_bytes(positions, n):
    out = [0] * ((n + 7) // 8)
    for position in positions:
        out[position // 8] += 2 ** (position % 8)
    return bytes(out)


def position_bytes(coding, positions, n):
    if coding == ALL:
        return b""
    if coding == BITMAP:
        return bitmap_bytes(positions, n)
    if coding == FLAT:
        return b"".join(struct.pack("<I", position) for position in positions)
    return gap_bytes(positions)


def cheapest(positions, n):
    """The coding of the fewest bytes and these; of equal ones the first."""
    if len(positions) == n:
        return ALL, b""
    written = [(coding, position_bytes(coding, positions, n)) for coding in (BITMAP, FLAT, GAPS)]
    return min(written, key=lambda pair: len(pair[1]))


def crc32(data):
    """CRC-32 of ISO 3309, bit by bit."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = (crc >> 1) ^ (0xEDB88320 if crc & 1 else 0)
    return crc ^ 0xFFFFFFFF


def message(body, dtype, row, coding, n, count, extra, weight, loss, steps=0.0):  # as in the header, in its order
    head = b"FSPX" + bytes([3, dtype, row, coding]) + struct.pack("<III", n, count, extra)
    tail = struct.pack("<ddd", weight, loss, steps)
    return head + struct.pack("<I", crc32(head + tail + body)) + tail + body
