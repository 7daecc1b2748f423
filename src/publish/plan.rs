//! What a publish would do, told before it does it: its steps, the requests that they take, and what those cost by.
//!
//! No prices: they differ between regions, and change. What AWS bills by is counted instead. Not counted are the repeats
//! of requests that fail, and what the SDK asks for to get its credentials.

use std::collections::BTreeMap;
use std::fmt;
use std::ops::AddAssign;

use serde::{Serialize, Serializer};

pub use super::action::{Action, Billed};

/// How many, as far as that is known before.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Count {
    least: u64,
    /// How many more there may be; none: there is no telling.
    more: Option<u64>,
}

impl Default for Count {
    fn default() -> Self {
        Self::exactly(0)
    }
}

/// Which side a [`Count`] is known from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Bound {
    /// Both.
    Exact,
    /// There may be more.
    Least,
    /// There may be fewer.
    Most,
}

impl Count {
    /// So many.
    pub(super) fn exactly(count: u64) -> Self {
        Self { least: count, more: Some(0) }
    }

    /// So many or more.
    pub(super) fn at_least(count: u64) -> Self {
        Self { least: count, more: None }
    }

    /// So many or fewer.
    pub(super) fn at_most(count: u64) -> Self {
        Self { least: 0, more: Some(count) }
    }

    /// The number, and what it says.
    #[must_use]
    pub fn known(self) -> (u64, Bound) {
        match self.more {
            Some(0) => (self.least, Bound::Exact),
            Some(more) => (self.least + more, Bound::Most),
            None => (self.least, Bound::Least),
        }
    }

    /// Whether there are certainly none.
    #[must_use]
    pub fn is_none(self) -> bool {
        self == Self::default()
    }
}

impl AddAssign for Count {
    fn add_assign(&mut self, other: Self) {
        self.least += other.least;
        self.more = self.more.zip(other.more).map(|(one, other)| one + other);
    }
}

impl fmt::Display for Bound {
    /// What stands before the number.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Exact => "",
            Self::Least => "≥ ",
            Self::Most => "≤ ",
        })
    }
}

impl fmt::Display for Count {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (count, bound) = self.known();
        write!(f, "{bound}{count}")
    }
}

impl Serialize for Count {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Written {
            count: u64,
            bound: Bound,
        }
        let (count, bound) = self.known();
        Written { count, bound }.serialize(serializer)
    }
}

/// Requests, by what they are.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Requests(BTreeMap<Action, Count>);

impl Requests {
    pub(super) fn add(&mut self, action: Action, count: Count) -> &mut Self {
        if !count.is_none() {
            *self.0.entry(action).or_default() += count;
        }
        self
    }

    /// So many more of these.
    pub(super) fn exactly(&mut self, action: Action, count: u64) -> &mut Self {
        self.add(action, Count::exactly(count))
    }

    /// So many more of these at least.
    pub(super) fn at_least(&mut self, action: Action, count: u64) -> &mut Self {
        self.add(action, Count::at_least(count))
    }

    /// All of these too.
    pub(super) fn extend(&mut self, others: &Self) -> &mut Self {
        for (action, count) in others.each() {
            self.add(action, count);
        }
        self
    }

    /// Each kind of them once.
    pub fn each(&self) -> impl Iterator<Item = (Action, Count)> {
        self.0.iter().map(|(action, count)| (*action, *count))
    }

    /// How many are billed in this way.
    #[must_use]
    pub fn billed(&self, way: Billed) -> Count {
        let mut sum = Count::default();
        self.each().filter(|(action, _)| action.billed() == Some(way)).for_each(|(_, count)| sum += count);
        sum
    }
}

impl Serialize for Requests {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Written {
            action: &'static str,
            #[serde(flatten)]
            count: Count,
            permissions: &'static [&'static str],
        }
        serializer.collect_seq(self.each().map(|(action, count)| Written {
            action: action.as_str(),
            count,
            permissions: action.permissions(),
        }))
    }
}

/// One thing that would be done.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Step {
    /// What: the end of a sentence that begins with "would".
    pub what: String,
    /// By which requests.
    pub requests: Requests,
}

/// Things that would be done, in order.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Steps(Vec<Step>);

impl Steps {
    /// Another step; what is returned takes its requests.
    pub(super) fn step(&mut self, what: impl Into<String>) -> &mut Requests {
        let at = self.0.len();
        self.0.push(Step { what: what.into(), requests: Requests::default() });
        &mut self.0[at].requests
    }

    pub(super) fn extend(&mut self, others: Self) {
        self.0.extend(others.0);
    }

    /// The requests of the first one.
    pub(super) fn first(&mut self) -> Option<&mut Requests> {
        self.0.first_mut().map(|step| &mut step.requests)
    }

    /// The requests of the last one.
    pub(super) fn last(&mut self) -> Option<&mut Requests> {
        self.0.last_mut().map(|step| &mut step.requests)
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// Each of them.
    pub fn each(&self) -> impl Iterator<Item = &Step> {
        self.0.iter()
    }

    /// All their requests.
    #[must_use]
    pub fn requests(&self) -> Requests {
        let mut all = Requests::default();
        for step in self.each() {
            all.extend(&step.requests);
        }
        all
    }
}

/// The object that a disk goes through.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Object {
    /// How long it is.
    pub bytes: Count,
    /// It stays; else it is deleted when it is imported.
    pub stays: bool,
}

/// What comes from another region.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Transfer {
    /// That region.
    pub region: String,
    /// How much.
    pub bytes: Count,
}

/// What AWS bills by, beside requests.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct Cost {
    /// What goes over the line to AWS, repeats and headers apart.
    pub bytes_sent: Count,
    /// What S3 copies inside itself instead.
    pub bytes_copied_in_s3: Count,
    /// What is stored in S3.
    pub object: Option<Object>,
    /// The data in the new snapshot.
    pub snapshot_bytes: Count,
    /// What is copied from another region.
    pub transfer: Option<Transfer>,
}

/// A way to the image.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Way {
    /// Its steps; the first one looks at what is there, and was made by the dry run too.
    pub steps: Steps,
    /// What it costs by.
    pub cost: Cost,
}

impl Serialize for Way {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Inputs<'a> {
            #[serde(flatten)]
            cost: &'a Cost,
            blocks_written: Count,
            s3_put_requests: Count,
            s3_get_requests: Count,
        }
        #[derive(Serialize)]
        struct Written<'a> {
            steps: &'a Steps,
            cost: Inputs<'a>,
            requests: Requests,
        }
        let requests = self.steps.requests();
        let cost = Inputs {
            cost: &self.cost,
            blocks_written: requests.billed(Billed::Block),
            s3_put_requests: requests.billed(Billed::S3Put),
            s3_get_requests: requests.billed(Billed::S3Get),
        };
        Written { steps: &self.steps, cost, requests }.serialize(serializer)
    }
}

/// What would be done for a region.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// How.
    pub way: Way,
    /// How instead, if EBS direct turns out not to be permitted.
    pub otherwise: Option<Way>,
}

impl Serialize for Plan {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        #[derive(Serialize)]
        struct Written<'a> {
            dry_run: bool,
            #[serde(flatten)]
            way: &'a Way,
            #[serde(skip_serializing_if = "Option::is_none")]
            otherwise: Option<&'a Way>,
        }
        Written { dry_run: true, way: &self.way, otherwise: self.otherwise.as_ref() }.serialize(serializer)
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_known_of_a_sum_is_what_is_known_of_its_parts() {
        let sum = |counts: &[Count]| {
            let mut sum = Count::default();
            for count in counts {
                sum += *count;
            }
            sum.known()
        };
        let [two, at_least, at_most] = [Count::exactly(2), Count::at_least(3), Count::at_most(5)];
        assert_eq!(sum(&[]), (0, Bound::Exact));
        assert_eq!(sum(&[two, two]), (4, Bound::Exact));
        assert_eq!(sum(&[two, at_least]), (5, Bound::Least));
        assert_eq!(sum(&[at_most, two]), (7, Bound::Most));
        assert_eq!(sum(&[at_most, at_least]), (3, Bound::Least), "the most is not known any more");
        assert_eq!([two, at_least, at_most].map(|count| count.to_string()), ["2", "≥ 3", "≤ 5"]);
        assert!(!Count::at_least(0).is_none() && Count::at_most(0).is_none());
    }

    #[test]
    fn requests_are_told_by_what_they_are_with_what_they_need() {
        let mut steps = Steps::default();
        steps.step("upload").exactly(Action::UploadPartCopy, 3).exactly(Action::DeleteObject, 0);
        steps.step("more").exactly(Action::UploadPartCopy, 1).at_least(Action::HeadObject, 1);
        let requests = steps.requests();
        assert_eq!(requests.billed(Billed::S3Put), Count::exactly(4));
        assert_eq!(
            json!(requests),
            json!([
                { "action": "s3:HeadObject", "count": 1, "bound": "least", "permissions": ["s3:GetObject", "s3:ListBucket"] },
                { "action": "s3:UploadPartCopy", "count": 4, "bound": "exact", "permissions": ["s3:PutObject", "s3:GetObject"] },
            ])
        );
    }

    #[test]
    fn a_plan_says_that_it_is_one() {
        let json = json!(Plan { way: Way::default(), otherwise: None });
        assert_eq!((&json["dry_run"], &json["requests"], &json["steps"]), (&json!(true), &json!([]), &json!([])));
        assert_eq!(json["cost"]["bytes_sent"], json!({ "count": 0, "bound": "exact" }));
        assert_eq!(json.get("otherwise"), None);
    }
}
