"""Supervision: what is on a port that a service wants is noticed before the service is taken for it."""

import os
import socket
from types import SimpleNamespace

import pytest

from belt_tasks.errors import ConfigError
from deployments import supervision
from deployments.services import HOST, PREFERRED_PORTS, Stack, free_ports, listener


@pytest.fixture
def stack(tmp_path) -> Stack:
    return Stack.make(tmp_path / "stack", **dict(zip(PREFERRED_PORTS, free_ports(3), strict=True)))


def test_a_listener_is_found():
    with socket.create_server((HOST, 0)) as listening:
        port = listening.getsockname()[1]
        assert listener(port) == os.getpid()

    assert listener(port) is None


@pytest.mark.parametrize("name", ["postgres", "s3", "server"])
def test_a_port_that_another_program_has_is_refused_by_name(stack, name, monkeypatch):
    monkeypatch.setattr(supervision, "PORT_S", 0.1)
    port = getattr(stack, f"{name}_port")
    words = rf"^{name}: port {port} is taken by another program \(.*, process {os.getpid()}\); stop .* --{name}-port"

    supervision.check_ports(stack)
    with socket.create_server((HOST, port)), pytest.raises(ConfigError, match=words):
        supervision.check_ports(stack)


def test_who_answers_in_a_services_place_is_not_taken_for_it(stack):
    def of(process_id: int) -> SimpleNamespace:
        return SimpleNamespace(getProcessInfo=lambda _: {"pid": process_id, "statename": "RUNNING"})

    with socket.create_server((HOST, stack.server_port)):
        assert "is taken by another program" in supervision.problem_of(stack, "server", of(2**22))
        assert supervision.problem_of(stack, "server", of(os.getppid())) == "does not answer"
    assert supervision.problem_of(stack, "server", of(os.getpid())) == "does not answer"
