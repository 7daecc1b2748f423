//! The manual: topics that no single command's help can explain.

use std::fmt::Write as _;

/// A topic of the manual.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Topic {
    /// The word for `kiln help`.
    pub name: &'static str,
    /// What it explains, in one line.
    pub summary: &'static str,
    /// The text: Markdown that reads well as it is.
    pub text: &'static str,
}

/// All topics, by name.
pub const TOPICS: &[Topic] = &[Topic {
    name: "cache",
    summary: "What is kept between builds, when it is taken, and what is in a key",
    text: include_str!("cache.md"),
}];

/// The topic with this name.
#[must_use]
pub fn find(name: &str) -> Option<&'static Topic> {
    TOPICS.iter().find(|topic| topic.name == name)
}

/// The topics, one a line, as the help of the command line lists them.
#[must_use]
pub fn contents() -> String {
    let mut text = "Topics of the manual, for `kiln help TOPIC`:".to_owned();
    for topic in TOPICS {
        let _ = write!(text, "\n  {:12}  {}", topic.name, topic.summary);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::Part;

    #[test]
    fn the_cache_topic_has_a_row_for_each_part_of_a_key() {
        let row = |name: &str, key: &str, why: &str| format!("| {name:17} | {key:4} | {why} |\n");
        let rule = ["-".repeat(17), "-".repeat(4)].map(|rule| format!("| {rule} ")).concat();
        let mut table = format!("{}{rule}| --- |\n", row("part", "key", "why"));
        for part in Part::ALL {
            table.push_str(&row(&part.name(), part.key().as_str(), part.why()));
        }
        let text = find("cache").unwrap().text;
        let rows: String = text.split_inclusive('\n').filter(|line| line.starts_with('|')).collect();
        assert_eq!(rows, table, "src/manual/cache.md must have this table:\n{table}");
    }

    #[test]
    fn the_topics_read_well_in_a_terminal() {
        for topic in TOPICS {
            assert!(topic.text.starts_with("# "), "{}", topic.name);
            let long = |line: &&str| line.chars().count() > if line.starts_with('|') { 115 } else { 80 };
            assert_eq!(topic.text.lines().find(long), None, "{}", topic.name);
        }
    }
}
