"""The port: its start, its end, TLS."""

import asyncio
import socket
import ssl
import subprocess

import grpc
import grpc.aio
import pytest
import uvloop

from tests.api.grpc.gates import GATES, close_gates, reached
from tests.api.grpc.served import INFER, STREAM_INFER, only, request, row, served

IDENTITY = request("identity", x=row(1, 2)).SerializeToString()


async def test_a_draining_server_finishes_what_it_has_and_takes_nothing_new(tmp_path):
    close_gates()
    async with served(tmp_path / "m", "gated", "identity") as port:
        peer = await port.peer()
        stream = await peer.ask(request("gated", x=row(1)).SerializeToString())
        idle = await port.peer()
        await reached(GATES.entered)
        draining = asyncio.create_task(port.server.drain(10))
        await idle.closed()
        assert [(goodbye.code, goodbye.last_stream) for goodbye in idle.goodbyes] == [(0, 2**31 - 1), (0, 0)]
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port.server.port)
        GATES.opened.set()
        assert only((await peer.answer(stream)).response) == [1]
        await peer.closed()
        assert peer.goodbyes[-1].last_stream == stream
        await asyncio.wait_for(draining, 10)
        peer.close()
        idle.close()


async def test_grpcio_does_not_notice_a_drain_but_by_its_end(tmp_path):
    close_gates()
    async with served(tmp_path / "m", "gated") as port:
        call = asyncio.create_task(port.infer(request("gated", x=row(1))))
        await reached(GATES.entered)
        draining = asyncio.create_task(port.server.drain(10))
        await asyncio.sleep(0)
        GATES.opened.set()
        assert only(await call) == [1]
        await asyncio.wait_for(draining, 10)
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await port.infer(request("gated", x=row(0)))
        assert caught.value.code() is grpc.StatusCode.UNAVAILABLE


async def test_a_stream_that_waits_for_its_client_ends_with_the_server(tmp_path):
    async with served(tmp_path / "m", "identity") as port:
        call = port.stream(timeout=20)
        await call.write(request("identity", x=row(1)))
        assert only((await call.read()).infer_response) == [1]
        draining = asyncio.create_task(port.server.drain(10))
        with pytest.raises(grpc.aio.AioRpcError) as caught:
            await call.read()
        assert (caught.value.code(), caught.value.details()) == (grpc.StatusCode.UNAVAILABLE, "Server is stopping, the stream has ended")
        await asyncio.wait_for(draining, 10)


async def test_a_client_that_does_not_listen_holds_up_a_drain_for_a_moment_only(tmp_path, monkeypatch):
    monkeypatch.setattr("fairlead.api.grpc.http2.LEAVE_SECONDS", 0.05)
    async with served(tmp_path / "m") as port:
        peer = await port.peer()
        await asyncio.wait_for(port.server.drain(60), 10)
        peer.close()


async def test_what_does_not_finish_in_time_is_cut_off(tmp_path):
    close_gates()
    async with served(tmp_path / "m", "gated") as port:
        peer = await port.peer()
        await peer.ask(request("gated", x=row(1)).SerializeToString())
        await reached(GATES.entered)
        await port.server.drain(0.1)
        assert (await port.lines.next())["status"] == 1
        GATES.opened.set()
        peer.close()


async def test_it_serves_on_a_socket_that_is_given(tmp_path):
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        async with served(tmp_path / "m", "identity") as port:
            await port.server.listen(sock=sock)
            address = f"127.0.0.1:{port.server.port}"
            assert address != port.address
            async with grpc.aio.insecure_channel(address) as channel:
                assert len(await channel.unary_unary(INFER)(IDENTITY)) > 0


async def test_it_speaks_tls(tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    subject = ["-subj", "/CN=localhost", "-addext", "subjectAltName=DNS:localhost"]
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2", *subject]
    subprocess.run([*command, "-keyout", key, "-out", certificate], check=True, capture_output=True)  # noqa: ASYNC221
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificate, key)
    async with served(tmp_path / "m", "identity", ssl_context=context) as port:
        credentials = grpc.ssl_channel_credentials(certificate.read_bytes())
        async with grpc.aio.secure_channel(
            f"localhost:{port.server.port}", credentials, [("grpc.default_authority", "localhost")]
        ) as channel:
            call = channel.unary_unary(INFER)
            assert len(set(await asyncio.gather(*(call(IDENTITY) for _ in range(20))))) == 1
        with pytest.raises(grpc.aio.AioRpcError):
            await port.infer(IDENTITY)


def test_it_runs_on_uvloop(tmp_path):
    """The loop that `fairlead serve` uses; the other tests run on asyncio's own."""

    async def talk():
        async with served(tmp_path / "m", "identity") as port:
            big = request("identity", x=row(*range(300_000)))
            answers = await asyncio.gather(*(port.infer(big) for _ in range(3)), *(port.infer(IDENTITY) for _ in range(50)))
            assert {len(only(answer)) for answer in answers} == {300_000, 2}
            peer = await port.peer()
            streams = [await peer.ask(IDENTITY, STREAM_INFER) for _ in range(10)]
            assert {(await peer.answer(stream)).status for stream in streams} == {"0"}
            await peer.send_raw(0, 0, 0, b"x")
            assert (await peer.goodbye()).code == 1
            peer.close()
            leaving = await port.peer()
            await asyncio.gather(port.server.drain(5), leaving.closed())
            leaving.close()

    uvloop.run(talk())
