"""Kernels of the elementwise linear recurrence."""

from pallas_kernels.gpu.limits import BLOCK_FEATURES, MULTIPROCESSORS

MIN_SEGMENT_LENGTH = 256  # time steps of a segment on GPU


def time_segments(batch: int, length: int, width: int) -> int:
    """Return the number of time segments on GPU: a power of two that divides the length.

    About 70 thread blocks saturate the memory of an H100. Each has about 50 KiB in flight, and the
    memory delivers 3.4 MB in a microsecond. Two passes move 5 arrays where one pass moves 3. They
    are faster when fewer than three fifths of these thread blocks exist, which is a third of the
    multiprocessors. Time is then split until every multiprocessor has one or two thread blocks.
    """
    blocks = batch * -(-width // BLOCK_FEATURES)
    count = 1
    if 3 * blocks < MULTIPROCESSORS:
        while length % (2 * count) == 0 and length // (2 * count) >= MIN_SEGMENT_LENGTH:
            if 2 * count * blocks > 2 * MULTIPROCESSORS:
                break
            count *= 2
    return count


def faster_on_gpu(batch: int, length: int, width: int) -> bool:
    """Return whether the GPU kernel is expected to beat XLA's associative scan.

    A thread block runs its steps in order, at about 60 ns each on an H100 ([32, 1024, 256]). Few
    thread blocks with many steps each therefore lose against a scan that uses the whole chip. The
    limits, 1024 steps or a third of the multiprocessors, are estimates from that rate.
    """
    segments = time_segments(batch, length, width)
    blocks = segments * batch * -(-width // BLOCK_FEATURES)
    return length // segments <= 1024 or 3 * blocks >= MULTIPROCESSORS
