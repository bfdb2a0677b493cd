"""The driver API, against a fake libcuda that counts what is held; on a real GPU where there is one."""

import ctypes
import ctypes.util
import shutil
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from memopt.cuda_driver import LIBRARY, Driver, MemoryInfo, driver_missing, open_driver
from memopt.errors import BackendError, OutOfResource

DEVICE, HOST, STREAM = range(3)
OUT_OF_MEMORY, NO_DEVICE, ILLEGAL_ADDRESS = 2, 100, 700


@pytest.fixture
def library(fake_libcuda, tmp_path):
    """A copy of its own, so that every test starts with a fresh fake."""
    return str(shutil.copy(fake_libcuda, tmp_path))


@pytest.fixture
def fake(library):
    loaded = ctypes.CDLL(library)
    loaded.fake_set_total.argtypes = (ctypes.c_size_t,)
    return loaded


@pytest.fixture
def driver(library, fake):  # the fake first: it is set before the driver reads it
    return open_driver(library)


def live(fake):
    return [fake.fake_live(kind) for kind in (DEVICE, HOST, STREAM)]


def test_device_is_described_without_a_context(library, fake):
    fake.fake_set_sm(12, 1)
    driver = Driver(library)
    assert (driver.name, driver.sm, driver.version) == ("Fake GPU", "sm121", "13.2")
    assert fake.fake_contexts() == 0


def test_driver_is_opened_once(library, driver):
    assert open_driver(library) is driver


def test_primary_context_is_retained_once_for_all_threads(fake, driver):
    with ThreadPoolExecutor(8) as threads:
        buffers = list(threads.map(driver.device_buffer, [64] * 64))
    for buffer in buffers:
        driver.free(buffer)
    assert fake.fake_contexts() == 1
    assert live(fake) == [0, 0, 0]


def use_everything(driver):
    """Every call that needs a context."""
    host, device, stream = driver.host_buffer(4), driver.device_buffer(4), driver.stream()
    driver.copy_to_device(device, host, size_bytes=4, stream=stream)
    driver.copy_to_host(host, device, size_bytes=4, stream=stream)
    driver.synchronize(stream)
    driver.mem_info()
    for held in (host, device, stream):
        driver.free(held)


def test_the_context_of_an_application_stays_current(fake, driver):
    use_everything(driver)
    assert fake.fake_depth() == 0
    theirs, current = ctypes.c_int(), ctypes.c_void_p()
    fake.cuCtxPushCurrent_v2(ctypes.byref(theirs))
    use_everything(driver)
    assert fake.cuCtxPopCurrent_v2(ctypes.byref(current)) == 0
    assert current.value == ctypes.addressof(theirs)
    assert fake.fake_depth() == 0


def test_the_context_of_an_application_stays_current_when_a_call_fails(fake, driver):
    stream = driver.stream()
    fake.fake_set_total(0)
    fake.fake_set_sync_result(ILLEGAL_ADDRESS)
    for call in (lambda: driver.device_buffer(8), lambda: driver.host_buffer(8), lambda: driver.synchronize(stream)):
        with pytest.raises((OutOfResource, BackendError)):
            call()
        assert fake.fake_depth() == 0


def test_our_context_is_current_inside_a_block_and_no_longer(fake, driver):
    with driver.current(), driver.current():
        use_everything(driver)
        assert fake.fake_ready()
    assert fake.fake_depth() == 0
    with pytest.raises(KeyError), driver.current():
        raise KeyError
    assert fake.fake_depth() == 0


def test_memory_info_follows_allocations(fake, driver):
    fake.fake_set_total(1000)
    assert driver.mem_info() == MemoryInfo(free_bytes=1000, total_bytes=1000)
    buffer = driver.device_buffer(300)
    assert driver.mem_info() == MemoryInfo(free_bytes=700, total_bytes=1000)
    driver.free(buffer)
    assert driver.mem_info().free_bytes == 1000


def test_no_driver_is_one_line():
    with pytest.raises(BackendError, match=r"^no NVIDIA driver on this machine \(.*nowhere.so") as refused:
        open_driver("/nowhere.so")
    assert "\n" not in str(refused.value)


def test_a_missing_driver_has_its_reason_and_a_present_one_none(library, fake):
    assert driver_missing("/nowhere.so").startswith("no NVIDIA driver on this machine (/nowhere.so")
    fake.fake_set_device_count(0)
    assert driver_missing(library) == "the NVIDIA driver sees no GPU"
    fake.fake_set_device_count(1)
    assert driver_missing(library) is None


def test_no_device_is_told_from_no_driver(library, fake):
    fake.fake_set_device_count(0)
    with pytest.raises(BackendError, match=r"^the NVIDIA driver sees no GPU$"):
        Driver(library)


def test_failed_start_carries_cudas_name_and_text(library, fake):
    fake.fake_set_init_result(NO_DEVICE)
    with pytest.raises(
        BackendError,
        match=r"^cuInit failed with CUDA_ERROR_NO_DEVICE \(100\): no CUDA-capable device is detected$",
    ):
        open_driver(library)
    fake.fake_set_init_result(0)
    assert open_driver(library).name == "Fake GPU"  # a failure is not remembered


def test_error_without_a_name_carries_its_number(library, fake):
    fake.fake_set_init_result(12345)
    with pytest.raises(BackendError, match=r"^cuInit failed with unknown CUDA error \(12345\)$"):
        Driver(library)


def test_library_of_something_else_is_refused():
    libc = ctypes.util.find_library("c") or "libc.so.6"
    with pytest.raises(BackendError, match=r"^the NVIDIA driver is too old: .*cuGetErrorName"):
        open_driver(libc)


def test_out_of_memory_names_needed_and_free(fake, driver):
    fake.fake_set_total(10 * 2**20)
    held = driver.device_buffer(6 * 2**20)
    with pytest.raises(OutOfResource) as refused:
        driver.device_buffer(8 * 2**20)
    assert str(refused.value) == ("8.00 MiB of device memory are needed, 4.00 MiB of 10.0 MiB are free on Fake GPU")
    driver.free(held)
    driver.free(driver.device_buffer(8 * 2**20))
    assert live(fake) == [0, 0, 0]


def test_out_of_pinned_memory_names_needed(fake, driver):
    fake.fake_set_total(1000)
    with pytest.raises(OutOfResource, match=r"^2.00 KiB of pinned host memory are needed, and not free$"):
        driver.host_buffer(2048)


def test_out_of_memory_in_a_stream_is_out_of_resource(fake, driver):
    stream = driver.stream()
    fake.fake_set_sync_result(OUT_OF_MEMORY)
    with pytest.raises(OutOfResource, match=r"^cuStreamSynchronize failed with CUDA_ERROR_OUT_OF_MEMORY \(2\)"):
        driver.synchronize(stream)


def test_failed_work_is_reported_by_synchronize(fake, driver):
    stream = driver.stream()
    fake.fake_set_sync_result(ILLEGAL_ADDRESS)
    with pytest.raises(BackendError, match=r"CUDA_ERROR_ILLEGAL_ADDRESS \(700\): an illegal memory access"):
        driver.synchronize(stream)


def test_everything_is_freed_once(fake, driver):
    held = [driver.device_buffer(8), driver.host_buffer(8), driver.stream()]
    assert live(fake) == [1, 1, 1]
    for handle in held + held:  # a second free would fail in the fake
        driver.free(handle)
    assert live(fake) == [0, 0, 0]


def test_second_free_spares_a_new_buffer_at_the_same_address(fake, driver):
    """Handles are told apart by identity: allocators give freed addresses out again."""
    old = driver.device_buffer(256)
    driver.free(old)
    new = [driver.device_buffer(256) for _ in range(4)]
    driver.free(old)
    assert fake.fake_live(DEVICE) == len(new)


def test_handles_cannot_be_changed(driver):
    with pytest.raises(AttributeError):
        driver.device_buffer(8).handle = 0


def test_empty_buffers_exist(fake, driver):
    buffer, staging = driver.device_buffer(0), driver.host_buffer(0)
    assert (buffer.size_bytes, staging.array.shape) == (0, (0,))
    driver.free(buffer)
    driver.free(staging)
    assert live(fake) == [0, 0, 0]


@settings(deadline=None, max_examples=20)
@given(data=st.binary(min_size=1, max_size=2000))
def test_copies_bring_back_what_was_sent(fake_libcuda, data):
    driver = open_driver(str(fake_libcuda))
    there, back = driver.host_buffer(len(data)), driver.host_buffer(len(data))
    device, stream = driver.device_buffer(len(data)), driver.stream()
    there.array[:] = np.frombuffer(data, np.uint8)
    driver.copy_to_device(device, there, size_bytes=len(data), stream=stream)
    driver.copy_to_host(back, device, size_bytes=len(data), stream=stream)
    driver.synchronize(stream)
    assert back.array.tobytes() == data
    for held in (there, back, device, stream):
        driver.free(held)


def test_copy_is_not_done_before_synchronize(driver):
    """The fake is as lazy as a GPU may be, so a forgotten synchronize is found."""
    host, device, stream = driver.host_buffer(4), driver.device_buffer(4), driver.stream()
    host.array[:] = 7
    driver.copy_to_device(device, host, size_bytes=4, stream=stream)
    host.array[:] = 9
    driver.synchronize(stream)
    driver.copy_to_host(host, device, size_bytes=4, stream=stream)
    driver.synchronize(stream)
    assert host.array.tolist() == [9, 9, 9, 9]


def test_copy_beyond_a_buffer_is_a_bug_not_a_crash(driver):
    host, device, stream = driver.host_buffer(4), driver.device_buffer(8), driver.stream()
    with pytest.raises(ValueError, match=r"8 bytes do not fit into \[8, 4\]"):
        driver.copy_to_device(device, host, size_bytes=8, stream=stream)


@pytest.mark.gpu
def test_real_driver_copies_and_frees():
    try:
        driver = open_driver(LIBRARY)
    except BackendError as error:
        pytest.skip(str(error))
    data = np.random.default_rng(0).integers(0, 256, 2**20, dtype=np.uint8)
    there, back = driver.host_buffer(data.nbytes), driver.host_buffer(data.nbytes)
    device, stream = driver.device_buffer(data.nbytes), driver.stream()
    there.array[:] = data
    driver.copy_to_device(device, there, size_bytes=data.nbytes, stream=stream)
    driver.copy_to_host(back, device, size_bytes=data.nbytes, stream=stream)
    driver.synchronize(stream)
    assert np.array_equal(back.array, data)
    for held in (there, back, device, stream):
        driver.free(held)
    memory = driver.mem_info()
    assert 0 < memory.free_bytes <= memory.total_bytes
    with pytest.raises(OutOfResource, match="of device memory are needed"):
        driver.device_buffer(2 * memory.total_bytes)
