//! In which order layers are read, and what of each: pure.
//!
//! Two disks that have files of their chains in common differ at most where the other files decide. So a layer is read from
//! a disk that is known already, and only there: the checkpoint before the point from the point's own disk, the one before
//! that from it, a branch from where it leaves. Each file's content is looked at about once from either side, whatever the
//! number of checkpoints.

/// What a layer is told from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum From {
    /// Nothing of it changed since the parent point.
    Parent,
    /// The disk at the point.
    Point,
    /// Another layer of the same disk.
    Layer(usize),
    /// Nothing that is known: all that is allocated is read.
    Nothing,
}

/// How a layer is read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Step {
    pub(super) from: From,
    /// Files of its own chain, leaf first, that the other does not have.
    pub(super) own: usize,
    /// Files of the other's chain that it does not have.
    pub(super) other: usize,
    /// Layers of one stage need only layers of stages before.
    pub(super) stage: usize,
}

/// Plans the layers of one disk. `point` is the chain of the disk at the point, leaf first, if the VM has it there;
/// `unchanged` tells which layers the parent point has.
pub(super) fn plan<F: PartialEq>(
    point: Option<&[F]>,
    layers: &[Vec<F>],
    unchanged: &[bool],
) -> Vec<Step> {
    let kept = Step { from: From::Parent, own: 0, other: 0, stage: 0 };
    let mut steps: Vec<Option<Step>> =
        unchanged.iter().map(|unchanged| unchanged.then_some(kept)).collect();
    steps.resize(layers.len(), None);
    let mut known: Vec<(From, &[F], usize)> = Vec::new();
    known.extend(point.map(|chain| (From::Point, chain, 0)));
    for (at, chain) in layers.iter().enumerate() {
        if steps[at].is_some() {
            known.push((From::Layer(at), chain, 1));
        }
    }
    loop {
        let open = steps.iter().enumerate().filter(|(_, step)| step.is_none());
        let nearest = open
            .flat_map(|(at, _)| known.iter().map(move |other| (at, other)))
            .filter_map(|(at, (from, chain, stage))| {
                let (own, other) = apart(&layers[at], chain)?;
                Some((own + other, at, Step { from: *from, own, other, stage: *stage }))
            })
            .min_by_key(|(apart, at, step)| (*apart, step.stage, *at));
        let (at, step) = match nearest {
            Some((_, at, step)) => (at, step),
            None => match steps.iter().position(Option::is_none) {
                Some(at) => (at, Step { from: From::Nothing, own: 0, other: 0, stage: 0 }),
                None => return steps.into_iter().flatten().collect(),
            },
        };
        steps[at] = Some(step);
        known.push((From::Layer(at), &layers[at], step.stage + 1));
    }
}

/// How many files, from the leaf on, each of two chains has for itself; `None` when they have nothing in common.
fn apart<F: PartialEq>(a: &[F], b: &[F]) -> Option<(usize, usize)> {
    let common = a.iter().rev().zip(b.iter().rev()).take_while(|(a, b)| a == b).count();
    (common > 0).then(|| (a.len() - common, b.len() - common))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Chains as texts, base first, for the eye.
    fn chain(files: &str) -> Vec<char> {
        files.chars().rev().collect()
    }

    fn step(from: From, own: usize, other: usize, stage: usize) -> Step {
        Step { from, own, other, stage }
    }

    #[test]
    fn ancestors_are_told_from_the_point_one_by_one_and_branches_from_where_they_leave() {
        // base a <- b <- c <- d is the point's; checkpoints froze a, b and c; another branch is a <- x <- y.
        let layers = ["a", "ab", "abc", "ax", "axy"].map(chain);
        let plan = plan(Some(&chain("abcd")), &layers, &[false; 5]);
        assert_eq!(plan[2], step(From::Point, 0, 1, 0));
        assert_eq!(plan[1], step(From::Layer(2), 0, 1, 1));
        assert_eq!(plan[0], step(From::Layer(1), 0, 1, 2));
        assert_eq!(plan[3], step(From::Layer(0), 1, 0, 3));
        assert_eq!(plan[4], step(From::Layer(3), 1, 0, 4));
    }

    #[test]
    fn layers_of_the_parent_point_are_taken_and_others_told_from_them_where_they_are_nearer() {
        let layers = ["a", "ab", "ax"].map(chain);
        let plan = plan(Some(&chain("abcd")), &layers, &[true, false, false]);
        assert_eq!(plan[0], step(From::Parent, 0, 0, 0));
        assert_eq!(plan[1], step(From::Layer(0), 1, 0, 1));
        assert_eq!(plan[2], step(From::Layer(0), 1, 0, 1));
    }

    #[test]
    fn a_disk_that_the_vm_has_not_any_more_is_read_once_and_then_told() {
        let layers = ["p", "pq", "z"].map(chain);
        let plan = plan(None, &layers, &[false; 3]);
        assert_eq!(plan[0], step(From::Nothing, 0, 0, 0));
        assert_eq!(plan[1], step(From::Layer(0), 1, 0, 1));
        assert_eq!(plan[2], step(From::Nothing, 0, 0, 0), "another file altogether");
    }
}
