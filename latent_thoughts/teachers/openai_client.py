"""The `openai` client: what it needs to know, and what its errors mean, in one line without the key."""

from __future__ import annotations

import email.utils
import os
import time
from dataclasses import replace
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from latent_thoughts.config.synthesize import Teacher as Config
from latent_thoughts.places import holds_keys
from latent_thoughts.teachers.base import Answer, Failure
from latent_thoughts.teachers.chat import kind_of_status, said
from latent_thoughts.types import UserError

_OWN = "https://api.openai.com/v1"
PATIENCE = 120.0  # seconds for which the client waits at most where an endpoint tells it to come back
LEAST = 16  # characters of a real key; servers of one's own are given "none" or "EMPTY"


def imported() -> Any:
    """The `openai` package. Raises UserError naming the extra where it is not installed."""
    try:
        import aiohttp  # noqa: F401
        import openai
    except ImportError:
        raise UserError("teachers behind an endpoint need an extra: pip install 'latent-thoughts[teachers]'") from None
    return openai


def endpoint(config: Config) -> str:
    """Who is asked: the recipe's `base_url`, else that of the environment, as every program of OpenAI's has it."""
    found = config.base_url or os.environ.get("OPENAI_BASE_URL") or _OWN
    if holds_keys(found):
        raise UserError(f"OPENAI_BASE_URL holds keys: take them out, and set {config.key_env}")
    return found


def settings(config: Config) -> dict[str, Any]:
    """The client's settings. Raises UserError where OpenAI's own endpoint is asked without a key."""
    key, where = os.environ.get(config.key_env), endpoint(config)
    if not key and where == _OWN:
        raise UserError(f"no key: set the environment variable {config.key_env} (synthesize.teacher.key_env)")
    url = urlsplit(where)
    return {
        "api_key": key or "none",
        "base_url": url._replace(query="", fragment="").geturl(),
        "default_query": dict(parse_qsl(url.query)),  # such as Azure's api-version
        "timeout": config.timeout,
        "max_retries": config.retries,
    }


def failure_of(error: Any, config: Config) -> Failure:
    """What an error of the client means."""
    openai = imported()
    where = endpoint(config)
    text = words(error, config)
    if isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
        return _refused(where, text, config)
    if isinstance(error, openai.NotFoundError) and "model" in text.lower():
        return Failure("unknown_model", f"{where} does not know model {config.model}: {text}", fatal=True)
    if isinstance(error, openai.NotFoundError):
        remedy = "correct synthesize.teacher.base_url, which often ends in /v1, or synthesize.teacher.model"
        return Failure("not_found", f"{where} answers 404 ({text}): {remedy}", fatal=True)
    if isinstance(error, openai.APIStatusError) and (pause := _pause(error.response.headers)) > PATIENCE:
        when = time.strftime("%Y-%m-%d %H:%M", time.localtime(time.time() + pause))
        return Failure("rate_limit", f"{where} asks not to be asked before {when} ({text}): run again then", fatal=True)
    if getattr(error, "status_code", None) == 402:
        return Failure("no_quota", f"{where} wants to be paid ({text}): run again when it is", fatal=True)
    if isinstance(error, openai.RateLimitError):
        no_money = getattr(error, "code", None) == "insufficient_quota"
        return Failure("no_quota" if no_money else "rate_limit", text, fatal=no_money)
    if isinstance(error, openai.APIStatusError):
        other = "max_completion_tokens"
        named = other in text and config.limit_name != other
        remedy = f" (set synthesize.teacher.limit_name={other})" if named else ""
        return Failure(kind_of_status(error.status_code, text), text + remedy)
    causes = _causes(error)
    if any(type(cause).__name__ in ("ConnectError", "ClientConnectorError") for cause in causes):
        reason = next((str(c) for c in causes if type(c).__name__ == "ClientConnectorError"), str(causes[-1]))
        return Failure("unreachable", f"{where} cannot be reached: {without_key(reason, config)}", fatal=True)
    if any(type(cause).__name__ == "RemoteProtocolError" for cause in causes):
        return Failure("broken_reply", f"{where} answered with {without_key(str(causes[1]), config)}")
    if isinstance(error, openai.APITimeoutError) and not any(isinstance(c, ConnectionError) for c in causes):
        return Failure("timeout", f"{where} was silent for {config.timeout:g} seconds")
    return Failure("connection", f"{where} broke the connection: {without_key(str(causes[-1]), config)}")


def _refused(where: str, text: str, config: Config) -> Failure:
    """Codes 401 and 403: mostly a matter of the key, where there is one."""
    if os.environ.get(config.key_env):
        return Failure("refused_key", f"{where} refuses the key in {config.key_env}: {text}", fatal=True)
    message = f"{where} refuses to answer: {text} (no key is set in {config.key_env})"
    return Failure("refused", message, fatal=True)


def _pause(headers: Any) -> float:
    """Seconds after which an endpoint wants to be asked again; 0 where it does not say."""
    told = headers.get("retry-after") or "0"
    try:
        return min(float(told), 1e8)  # three years: what is for ever has no date
    except ValueError:
        pass
    try:
        date = email.utils.parsedate_tz(told)
        return min(email.utils.mktime_tz(date) - time.time(), 1e8) if date else 0.0
    except (ValueError, OverflowError):  # a date that there will not be
        return 0.0


def _causes(error: BaseException) -> list[BaseException]:
    found = [error]
    while (cause := found[-1].__cause__) is not None:
        found.append(cause)
    return found


def words(error: Any, config: Config) -> str:
    """What the endpoint said, without the key."""
    return without_key(said(getattr(error, "body", None) or error), config)


def hidden(answer: Answer, config: Config) -> Answer:
    """The answer without the key, should the endpoint have echoed it."""
    if isinstance(answer, Failure):
        return replace(answer, message=without_key(answer.message, config))
    return replace(answer, text=_keyless(answer.text, config))


def _keyless(text: str, config: Config) -> str:
    """A word that serves as a key is left: it may be one of the reply's."""
    key = os.environ.get(config.key_env, "")
    return text.replace(key, _named(config)) if len(key) >= LEAST else text


def _named(config: Config) -> str:
    return f"(the key in {config.key_env})"


def without_key(text: str, config: Config) -> str:
    """The beginning of what an endpoint said; the key is taken out first, so that no half of it is left."""
    key = os.environ.get(config.key_env)
    return (text.replace(key, _named(config)) if key else text)[:300]
