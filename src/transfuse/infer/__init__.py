"""Knowledge that is moved while a frozen model answers: nothing is trained, outputs are put together."""

__all__: list[str] = []
