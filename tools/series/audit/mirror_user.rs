// SPDX-License-Identifier: GPL-2.0
//! A user of the crate, in a module of its own: what it links to depends on its license.

use hmm::{Invalidate, Invalidated, Mirror, MirrorOps};
use kernel::{prelude::*, sync::Arc};

module! {
    type: User,
    name: "mirror_user",
    description: "A user of a mirror",
    license: "GPL",
}

struct Ops;

impl MirrorOps for Ops {
    fn invalidate<'op>(&self, event: Invalidate<'op>) -> Invalidated<'op> {
        event.done()
    }
}

struct User {
    _mirror: Mirror,
}

impl kernel::Module for User {
    fn init(module: &'static ThisModule) -> Result<Self> {
        Ok(Self {
            _mirror: Mirror::new(module, Arc::new(Ops, GFP_KERNEL)?)?,
        })
    }
}
