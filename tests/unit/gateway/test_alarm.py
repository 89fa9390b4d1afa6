"""An alarm rings at the time that was set last, and then once."""

import asyncio

from gateway.alarm import Alarm


async def test_alarm_rings_once_when_its_time_has_come() -> None:
    rung = asyncio.Event()
    alarm = Alarm(rung.set)
    alarm.set(0.001)
    async with asyncio.timeout(10):
        await rung.wait()
    rung.clear()
    assert await silent(rung)


async def test_alarm_rings_at_the_later_time_when_it_moves_on() -> None:
    loop, rung = asyncio.get_running_loop(), asyncio.Event()
    alarm = Alarm(rung.set)
    began_s = loop.time()
    alarm.set(0.001)
    alarm.set(0.05)
    async with asyncio.timeout(10):
        await rung.wait()
    assert loop.time() - began_s >= 0.049  # uvloop counts in milliseconds


async def test_alarm_rings_at_the_earlier_time_when_it_moves_back() -> None:
    rung = asyncio.Event()
    alarm = Alarm(rung.set)
    alarm.set(3600.0)
    alarm.set(0.001)
    async with asyncio.timeout(10):
        await rung.wait()


async def test_alarm_rings_again_when_it_is_set_after_it_was_off() -> None:
    rung = asyncio.Event()
    alarm = Alarm(rung.set)
    alarm.set(0.001)
    alarm.off()
    assert await silent(rung)
    alarm.set(0.001)
    async with asyncio.timeout(10):
        await rung.wait()


async def test_alarm_never_rings_when_it_is_closed() -> None:
    rung = asyncio.Event()
    alarm = Alarm(rung.set)
    alarm.set(0.001)
    alarm.close()
    assert await silent(rung)


async def silent(rung: asyncio.Event) -> bool:
    """Whether nothing rang until a later timer of the same loop came."""
    later = asyncio.Event()
    asyncio.get_running_loop().call_later(0.02, later.set)
    await later.wait()
    return not rung.is_set()
