import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--profile", default="quick", help="whose shapes are taken: tiny, quick, full or gpu")
    parser.addoption("--model", default="Llama-3.2-1B", help="the model whose head is taken")
