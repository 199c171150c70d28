"""The cache of reference log-probs: what was put is there, whoever writes, dies or forks; and what names a value."""

import hashlib
import multiprocessing
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from huggingface_hub import constants

from qlora_dpo import cache
from qlora_dpo.cache import DEVICE_ROWS, ROW_WORDS, LogpsCache, completion_key, default_cache_path, weights_fingerprint

WRITER = """
import importlib.util, sys
import numpy as np
spec = importlib.util.spec_from_file_location("cache", sys.argv[1])  # without the package, which imports for seconds
cache = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cache)
print("ready", flush=True)
sys.stdin.readline()
stored = cache.LogpsCache(sys.argv[2])
for key in range(int(sys.argv[3]), int(sys.argv[4])):
    stored.put("base", [str(key)], [np.arange(key, dtype=np.float32)])
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "a" / "folder" / "logps.sqlite"


@pytest.fixture
def stored(path):
    return LogpsCache(path)


def integrity(path):
    connection = sqlite3.connect(path)
    result = connection.execute("PRAGMA integrity_check").fetchone()[0]
    connection.close()
    return result


def run_sql(path, statement):
    connection = sqlite3.connect(path)
    with connection:
        connection.execute(statement)
    connection.close()


def in_a_fork(target, *arguments):
    """Start a target in a forked process."""
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
def test_values_return_bit_for_bit_with_their_dtype(stored, dtype):
    values = [np.array([-0.0, np.nan, -np.inf, np.finfo(dtype).tiny / 2, -1 / 3], dtype=dtype), np.empty(0, dtype)]
    stored.put("base", ["a", "b"], values)
    for found, value in zip(stored.get("base", ["a", "b"]), values, strict=True):
        assert found.dtype == value.dtype
        assert found.tobytes() == value.tobytes()


def test_a_strided_value_is_stored_in_its_own_order(stored):
    stored.put("base", ["a"], [np.arange(10.0)[::-3]])
    assert stored.get("base", ["a"])[0].tolist() == [9.0, 6.0, 3.0, 0.0]


def test_a_value_found_may_be_written_to(stored):
    stored.put("base", ["a"], [np.zeros(2)])
    stored.get("base", ["a"])[0][0] = 1.0
    assert stored.get("base", ["a"])[0][0] == 0.0


def test_a_key_that_was_not_put_misses(stored):
    stored.put("base", ["a"], [np.ones(1)])
    assert [value is None for value in stored.get("base", ["b", "a", "c", "a"])] == [True, False, True, False]


def test_another_identity_misses(stored):
    stored.put("base", ["a"], [np.ones(1)])
    assert stored.get("another base", ["a"]) == [None]


def test_the_first_value_is_kept(stored):
    stored.put("base", ["a", "a"], [np.array([1.0]), np.array([2.0])])
    stored.put("base", ["a"], [np.array([3.0])])
    assert stored.get("base", ["a"])[0] == 1.0
    assert len(stored) == 1


def test_more_keys_than_one_query_takes_are_found_in_order(stored):
    keys = [str(i) for i in range(1203)]
    stored.put("base", keys, [np.array([float(key)]) for key in keys])
    assert [value[0] for value in stored.get("base", keys[::-1])] == list(range(1202, -1, -1))


def test_no_keys_are_no_work(stored):
    stored.put("base", [], [])
    assert stored.get("base", []) == []
    assert len(stored) == 0


def test_a_refused_put_stores_nothing(stored):
    with pytest.raises(TypeError, match=r"`values` must be float32 or float64, got float16. Convert them"):
        stored.put("base", ["a", "b"], [np.ones(1), np.ones(1, np.float16)])
    with pytest.raises(ValueError, match=r"`values` must be one-dimensional, got shape \(2, 1\). Pass one row"):
        stored.put("base", ["a", "b"], [np.ones(1), np.ones((2, 1))])
    with pytest.raises(ValueError, match=r"`values` must hold one per key, got 1 for 2 keys. Pass as many"):
        stored.put("base", ["a", "b"], [np.ones(1)])
    with pytest.raises(sqlite3.Error):  # the caller's slip, found in the middle of the transaction
        stored.put("base", ["a", None], [np.ones(1), np.ones(1)])
    assert len(stored) == 0


def test_two_processes_lose_nothing_of_each_other(path):
    command = [sys.executable, "-c", WRITER, cache.__file__, str(path)]
    writers = [
        subprocess.Popen([*command, *span], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for span in (("0", "200"), ("100", "300"))
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:  # both create the file now, and write
        writer.stdin.write("\n")
        writer.stdin.flush()
    for writer in writers:
        writer.communicate()
    assert [writer.returncode for writer in writers] == [0, 0]
    found = LogpsCache(path).get("base", [str(i) for i in range(300)])
    assert [len(value) for value in found] == list(range(300))
    assert integrity(path) == "ok"


def write_until_killed(path, done):
    stored = LogpsCache(path)
    for i in range(10**9):  # each more than SQLite keeps in memory, so the file changes before the transaction ends
        stored.put("base", [f"{i}/{j}" for j in range(8)], [np.full(50_000, i + j / 8) for j in range(8)])
        done.send(i)


@pytest.mark.parametrize("puts", [1, 2, 4])
def test_a_killed_writer_loses_nothing_it_put(path, puts):
    receiver, sender = multiprocessing.Pipe(duplex=False)
    writer = in_a_fork(write_until_killed, path, sender)
    sender.close()
    last = [receiver.recv() for _ in range(puts)][-1]
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    while receiver.poll():
        try:
            last = receiver.recv()
        except EOFError:
            break
    stored = LogpsCache(path)
    for i in range(last + 1):
        for j, value in enumerate(stored.get("base", [f"{i}/{j}" for j in range(8)])):
            assert (value == i + j / 8).all()
    assert len(stored) % 8 == 0
    assert integrity(path) == "ok"


class KillsWhenBound:
    """A key that SQLite asks for its value in the middle of a transaction."""

    def __conform__(self, protocol):
        os.kill(os.getpid(), signal.SIGKILL)


def put_half(stored):
    keys = [*(f"half {i}" for i in range(8)), KillsWhenBound()]
    stored.put("base", keys, [np.zeros(50_000)] * len(keys))  # the file changes before the transaction ends


def test_a_put_that_a_kill_cut_off_is_undone(stored):
    stored.put("base", ["a"], [np.full(5_000, 0.5)])
    before = stored.path.stat().st_size
    writer = in_a_fork(put_half, stored)
    writer.join()
    assert writer.exitcode == -signal.SIGKILL
    assert stored.path.stat().st_size > before
    assert (stored.get("base", ["a"])[0] == 0.5).all()
    assert len(stored) == 1
    assert stored.path.stat().st_size == before
    assert integrity(stored.path) == "ok"


def copy_a_to_b(stored):
    stored.put("base", ["b"], stored.get("base", ["a"]))


def test_a_forked_process_shares_the_cache(stored):
    stored.put("base", ["a"], [np.ones(3)])
    process = in_a_fork(copy_a_to_b, stored)
    process.join()
    assert process.exitcode == 0
    stored.put("base", ["c"], [np.ones(1)])
    assert [len(value) for value in stored.get("base", ["a", "b", "c"])] == [3, 3, 1]


def test_threads_share_the_cache(stored):
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: stored.put("base", [str(i)], [np.full(2, float(i))]), range(40)))
    assert [value[1] for value in stored.get("base", [str(i) for i in range(40)])] == list(range(40))


def test_a_pickled_cache_is_the_same_file(stored):
    stored.put("base", ["a"], [np.ones(3)])
    copy = pickle.loads(pickle.dumps(stored))
    copy.put("base", ["b"], [np.ones(2)])
    assert [len(value) for value in stored.get("base", ["a", "b"])] == [3, 2]


def test_a_cache_that_was_deleted_starts_anew(stored):
    stored.put("base", ["a"], [np.ones(3)])
    stored.path.unlink()
    assert stored.get("base", ["a"]) == [None]


def test_a_file_that_is_no_database_is_refused(path):
    path.parent.mkdir(parents=True)
    path.write_text("prompt,chosen,rejected")
    with pytest.raises(RuntimeError, match=r"`path` must be a cache .* damaged or foreign file .*logps.sqlite. Delete"):
        LogpsCache(path)
    assert path.read_text() == "prompt,chosen,rejected"


def test_a_damaged_file_is_refused(stored):
    stored.put("base", [str(i) for i in range(99)], [np.ones(999)] * 99)
    content = bytearray(stored.path.read_bytes())
    content[4096:] = bytes(len(content) - 4096)
    stored.path.write_bytes(content)
    with pytest.raises(RuntimeError, match=r"logps.sqlite. Delete it if it is a cache, else name another file"):
        stored.get("base", ["1"])


@pytest.mark.parametrize("damage", ["value = zeroblob(8)", "value = x'00'", "crc32 = crc32 + 1"])
def test_a_damaged_value_is_never_returned(stored, damage):
    stored.put("base", ["a"], [np.ones(3)])
    run_sql(stored.path, f"UPDATE logps SET {damage}")
    with pytest.raises(RuntimeError, match="damaged or foreign"):
        stored.get("base", ["a"])


def test_the_database_of_another_program_is_refused_and_left_alone(path):
    path.parent.mkdir(parents=True)
    run_sql(path, "CREATE TABLE bookmarks (url TEXT)")
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="damaged or foreign"):
        LogpsCache(path)
    assert path.read_bytes() == before


def test_a_newer_version_is_refused(stored):
    run_sql(stored.path, "PRAGMA user_version = 2")
    with pytest.raises(RuntimeError, match=r"version 1 or older, got version 2 in .*logps.sqlite. Upgrade the package"):
        stored.get("base", ["a"])


def test_a_file_that_cannot_be_opened_is_named(tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    with pytest.raises(RuntimeError, match=r"`path` must be .* got 'unable to open .*folder. Name another file"):
        LogpsCache(folder)


def test_a_file_that_stays_locked_is_named(stored, monkeypatch):
    monkeypatch.setattr(cache, "BUSY_SECONDS", 0.01)
    other = sqlite3.connect(stored.path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(RuntimeError, match=r"got 'database is locked' from .*logps.sqlite"):
        stored.put("base", ["a"], [np.ones(1)])
    assert stored.get("base", ["a"]) == [None]  # a reader need not wait for a writer that has not committed
    other.close()


def test_the_default_path_follows_hf_home(monkeypatch, tmp_path):
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path))
    assert default_cache_path() == str(tmp_path / "qlora_dpo" / "reference_logps.sqlite")


def test_a_completion_key_knows_where_the_prompt_ends():
    keys = [completion_key([1, 2, 3][:n], [1, 2, 3][n:]) for n in range(4)]
    keys += [completion_key([], []), completion_key([0], []), completion_key([], [0]), completion_key([2], [1, 3])]
    assert len(set(keys)) == len(keys)
    assert completion_key((1, 2), np.array([3], dtype=np.int32)) == completion_key([1, 2], [3])


def fingerprint(tensor):
    return weights_fingerprint([("w", tensor)])


def random_bytes(n):
    return torch.randint(0, 256, (n,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


def naive_sums(data):
    """`(rows, 2)` sums of a tensor's digest, by the formula and Python's integers."""
    words = np.frombuffer(data.numpy().tobytes() + bytes(-len(data) % 4), dtype="<i4").tolist()
    factors = cache._odd_factors(torch.device("cpu")).tolist()
    rows = [words[start : start + ROW_WORDS] for start in range(0, len(words), ROW_WORDS)]
    sums = [[sum(w * f for w, f in zip(row, factor, strict=False)) % 2**64 for factor in factors] for row in rows]
    return np.array(sums, dtype=np.uint64)


@pytest.mark.parametrize("rows_at_once", [1, DEVICE_ROWS])
def test_the_digest_is_its_formula_however_many_rows_are_taken_at_once(monkeypatch, rows_at_once):
    data = random_bytes(8 * ROW_WORDS + 13)
    monkeypatch.setattr(cache, "CPU_ROWS", rows_at_once)
    assert cache._content_digest(data) == hashlib.sha256(naive_sums(data).tobytes()).hexdigest()


def test_every_factor_is_odd_and_another():
    factors = cache._odd_factors(torch.device("cpu"))
    assert (factors % 2 == 1).all()
    assert factors.unique().numel() == factors.numel() == 2 * ROW_WORDS


def test_the_same_content_has_the_same_fingerprint():
    values = torch.randn(33, 7)
    assert fingerprint(values) == fingerprint(values.clone()) == fingerprint(values.clone().requires_grad_())


def test_any_flipped_bit_changes_the_fingerprint():
    data = random_bytes(67)
    seen = {fingerprint(data)}
    for bit in range(8 * len(data)):
        flipped = data.clone()
        flipped[bit // 8] ^= 1 << bit % 8
        seen.add(fingerprint(flipped))
    assert len(seen) == 8 * len(data) + 1


@pytest.mark.parametrize("place", [0, 4 * ROW_WORDS - 1, 4 * ROW_WORDS, 8 * ROW_WORDS + 12])
def test_a_flipped_bit_anywhere_in_a_large_tensor_changes_the_fingerprint(place):
    data = random_bytes(8 * ROW_WORDS + 13)
    flipped = data.clone()
    flipped[place] ^= 128
    assert fingerprint(flipped) != fingerprint(data)


def test_moved_values_change_the_fingerprint():
    values = torch.arange(4.0 * ROW_WORDS).view(4, ROW_WORDS)
    moved = [values.view(ROW_WORDS, 4).T.reshape(4, -1), values.flip(0), values.flip(1), values.roll(1, 0), -values]
    moved.append(values.clone())
    moved[-1][0, [0, 1]] = values[0, [1, 0]]
    assert len({fingerprint(tensor) for tensor in [values, *moved]}) == 7


def test_negated_doubles_change_the_fingerprint():
    """Their highest bits flip, which sums of 64-bit words times odd numbers would not see in pairs."""
    ones = torch.ones(2, dtype=torch.float64)
    assert fingerprint(ones) != fingerprint(-ones)


def test_a_name_a_dtype_and_a_shape_count():
    tensors = [torch.zeros(4), torch.zeros(4, dtype=torch.int32), torch.zeros(2, 2), torch.zeros(5), torch.zeros(4, 1)]
    tensors += [torch.zeros(0), torch.zeros(0, 3), torch.zeros(()), torch.zeros(1), torch.zeros(8).bfloat16()]
    seen = {weights_fingerprint([(name, tensor)]) for name in ("v", "w") for tensor in tensors}
    seen |= {weights_fingerprint([]), weights_fingerprint([("v", tensors[0]), ("w", tensors[0])])}
    assert len(seen) == 2 * len(tensors) + 2


def test_only_the_order_of_the_tensors_does_not_count():
    a, b = torch.randn(3), torch.randn(3)
    assert weights_fingerprint([("a", a), ("b", b)]) == weights_fingerprint(iter([("b", b), ("a", a)]))
    assert weights_fingerprint([("a", a), ("b", b)]) != weights_fingerprint([("a", b), ("b", a)])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.bfloat16, torch.float64, torch.complex64])
def test_a_view_has_the_fingerprint_of_its_copy(dtype):
    values = (10 * torch.randn(9, 10)).to(dtype)
    for view in (values.T, values[:, 1], values[1:, 3:5], values[1], values[::2, ::2][:1, :1], values[3, 7]):
        assert fingerprint(view) == fingerprint(view.clone(memory_format=torch.contiguous_format))


def test_a_tensor_without_values_is_refused():
    with pytest.raises(ValueError, match=r"`tensors` must hold their values, got 'w' on the meta device. Load it"):
        fingerprint(torch.empty(2, device="meta"))
