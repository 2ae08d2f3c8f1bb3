//! The security of what goes through a proxy of COM.
//!
//! `unsafe` because every COM call is.
#![allow(unsafe_code)]

use windows::Win32::System::Com::{
    CoSetProxyBlanket, EOAC_NONE, RPC_C_AUTHN_LEVEL_PKT_PRIVACY, RPC_C_IMP_LEVEL_IMPERSONATE,
};
use windows::Win32::System::Rpc::{RPC_C_AUTHN_WINNT, RPC_C_AUTHZ_NONE};
use windows::core::{IUnknown, Interface};

/// Signs and encrypts what goes through a proxy: the namespace of failover clusters asks for it.
pub(super) fn protect(proxy: &impl Interface) -> windows::core::Result<()> {
    let proxy: IUnknown = proxy.cast()?;
    // SAFETY: the proxy lives until the call returns; no other pointer is passed.
    unsafe {
        CoSetProxyBlanket(
            &proxy,
            RPC_C_AUTHN_WINNT,
            RPC_C_AUTHZ_NONE,
            None,
            RPC_C_AUTHN_LEVEL_PKT_PRIVACY,
            RPC_C_IMP_LEVEL_IMPERSONATE,
            None,
            EOAC_NONE,
        )
    }
}

/// As [`protect`], for objects that come out of a protected one: they do not inherit it, and some of them are in this
/// very process and no proxies at all.
pub(super) fn protect_if_proxy(proxy: &impl Interface) {
    if let Err(e) = protect(proxy) {
        tracing::trace!(error = %e, "an object without a security of its own");
    }
}
