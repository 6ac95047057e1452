import uvloop


def pytest_asyncio_loop_factories(config, item):
    """The loop that serves is the loop that is tested."""
    return {"uvloop": uvloop.new_event_loop}
