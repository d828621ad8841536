"""Who calls, and which namespace its KV pages live in. Salts are the server's; a client can only name a group."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Mapping

from forkkv_cluster.core.errors import InvalidArgument, Unauthenticated

DEFAULT_TENANT = "default"


def authenticate(api_tokens: Mapping[str, str], authorization: str | None) -> str | None:
    """The tenant that the bearer token stands for; None on a server without ``api_tokens``, where everybody is trusted.

    Raises Unauthenticated.
    """
    if not api_tokens:
        return None
    scheme, _, token = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not token:
        raise Unauthenticated("This server needs a token. Send `authorization: Bearer TOKEN`.")
    return _tenant_of(api_tokens, token.strip())


def acting_tenant(caller: str | None, claimed: str) -> str:
    """Whom a request acts for: the caller itself, or on an open server whomever it names. Raises InvalidArgument."""
    if caller is None:
        return claimed or DEFAULT_TENANT
    if claimed and claimed != caller:
        raise InvalidArgument("tenant", claimed, "is not the tenant of the token", "Leave it empty.")
    return caller


def _tenant_of(api_tokens: Mapping[str, str], token: str) -> str:
    # Every token is compared in constant time, so that the time taken tells nothing.
    found: str | None = None
    for known, tenant in api_tokens.items():
        if hmac.compare_digest(known.encode(), token.encode()):
            found = tenant
    if found is None:
        raise Unauthenticated("The token is not known. Ask the operator for one.")
    return found


def page_namespace(salt: str, tenant: str, sharing_group: str = "") -> str:
    """Namespace of page identity, 32 hex characters: a tenant's own, or that of a sharing group which several name.

    A keyed hash, so that no tenant can name another's namespace; groups and tenants of one name differ.
    """
    kind, name = ("group", sharing_group) if sharing_group else ("tenant", tenant)
    return hmac.new(salt.encode(), f"{kind}:{name}".encode(), hashlib.sha256).hexdigest()[:32]
