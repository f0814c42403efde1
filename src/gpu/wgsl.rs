//! The preprocessor that turns a `.wgsl` file of `shaders/` into the text of one kernel variant.
//!
//! A file holds one family of kernels: a common head, then one `#kernel NAME` section each. Directives:
//!
//! | directive | meaning |
//! |---|---|
//! | `#kernel NAME` | what follows, up to the next `#kernel`, belongs to that kernel alone |
//! | `#import NAME` | the text of `shaders/shared/NAME.wgsl`, once |
//! | `#params` | declares `params` (of type `Params`) as immediate data, or as a uniform where there is none |
//! | `#ifdef K`, `#ifndef K`, `#if EXPR`, `#else`, `#endif` | conditions; a name is defined when the variant lists it |
//! | `#unroll i in A..B` … `#end` | the lines between, once for each i |
//! | `#{EXPR}` | an integer expression over the variant's constants and the unroll counters |
//!
//! This file uses nothing but std, because `build.rs` compiles it too and validates every variant with naga.

use std::collections::{BTreeMap, BTreeSet};

/// Names and their integer values: a variant's constants.
pub type Defines = BTreeMap<String, i64>;

/// One line of `shaders/variants`: `family.kernel[.suffix] NAME[=VALUE]...`
#[derive(Clone, Debug)]
pub struct Variant {
    pub name: String,
    pub family: String,
    pub kernel: String,
    pub defines: Defines,
}

/// Reads `shaders/variants`. A `#` starts a comment; blank lines are skipped.
pub fn parse_variants(text: &str) -> Result<Vec<Variant>, String> {
    let mut variants = Vec::new();
    for (number, line) in text.lines().enumerate() {
        let line = line.split('#').next().unwrap_or("").trim();
        let Some((name, rest)) = line.split_once(char::is_whitespace).or((!line.is_empty()).then_some((line, "")))
        else {
            continue;
        };
        let mut parts = name.split('.');
        let (Some(family), Some(kernel)) = (parts.next(), parts.next()) else {
            return Err(format!("variants:{}: `{name}` is not family.kernel", number + 1));
        };
        let mut defines = Defines::new();
        for word in rest.split_whitespace() {
            let (key, value) = word.split_once('=').unwrap_or((word, "1"));
            let value = value.parse().map_err(|_| format!("variants:{}: `{word}` is no integer", number + 1))?;
            defines.insert(key.to_string(), value);
        }
        variants.push(Variant { name: name.into(), family: family.into(), kernel: kernel.into(), defines });
    }
    Ok(variants)
}

/// Expands `variant` of its family's text. `file(name)` gives the text of `shaders/NAME.wgsl`.
pub fn expand<'a>(variant: &Variant, modes: &[&str], file: &dyn Fn(&str) -> Option<&'a str>) -> Result<String, String> {
    let mut defines = variant.defines.clone();
    defines.extend(modes.iter().map(|mode| (mode.to_string(), 1)));
    let mut state =
        Expander { kernel: &variant.kernel, file, imported: BTreeSet::new(), out: String::new(), found: false };
    let text = file(&variant.family).ok_or_else(|| format!("shaders/{}.wgsl is missing", variant.family))?;
    let lines: Vec<&str> = text.lines().collect();
    state.block(&variant.family, &lines, 0, &mut defines)?;
    if !state.found {
        return Err(format!("{}.wgsl has no `#kernel {}`", variant.family, variant.kernel));
    }
    Ok(state.out)
}

struct Expander<'f, 'a> {
    kernel: &'f str,
    file: &'f dyn Fn(&str) -> Option<&'a str>,
    imported: BTreeSet<String>,
    out: String,
    found: bool,
}

impl Expander<'_, '_> {
    fn block(&mut self, name: &str, lines: &[&str], first: usize, defines: &mut Defines) -> Result<(), String> {
        // One entry per open #if: is this branch taken, were we live outside it.
        let mut conditions: Vec<(bool, bool)> = Vec::new();
        let mut in_section = true;
        let mut at = 0;
        while at < lines.len() {
            let line = lines[at];
            let fail = |what: String| format!("{name}.wgsl:{}: {what}", first + at + 1);
            let live = in_section && conditions.iter().all(|&(taken, _)| taken);
            let trimmed = line.trim();
            let (word, rest) = trimmed.split_once(char::is_whitespace).unwrap_or((trimmed, ""));
            let rest = rest.split("//").next().unwrap_or("").trim();
            match word {
                "#kernel" => {
                    if !conditions.is_empty() {
                        return Err(fail("#kernel inside #if".into()));
                    }
                    in_section = rest == self.kernel;
                    self.found |= in_section;
                }
                "#ifdef" => conditions.push((defines.contains_key(rest), live)),
                "#ifndef" => conditions.push((!defines.contains_key(rest), live)),
                "#if" => conditions.push((live && evaluate(rest, defines).map_err(fail)? != 0, live)),
                "#else" => match conditions.last_mut() {
                    Some(condition) => condition.0 = !condition.0,
                    None => return Err(fail("#else without #if".into())),
                },
                "#endif" => {
                    conditions.pop().ok_or_else(|| fail("#endif without #if".into()))?;
                }
                "#unroll" => {
                    let length = matching_end(&lines[at + 1..]).ok_or_else(|| fail("#unroll without #end".into()))?;
                    if live {
                        let (counter, from, to) = unroll_range(rest, defines).map_err(fail)?;
                        let shadowed = defines.get(counter).copied();
                        for i in from..to {
                            defines.insert(counter.to_string(), i);
                            self.block(name, &lines[at + 1..at + 1 + length], first + at + 1, defines)?;
                        }
                        match shadowed {
                            Some(value) => defines.insert(counter.to_string(), value),
                            None => defines.remove(counter),
                        };
                    }
                    at += length + 1;
                }
                "#import" if live && self.imported.insert(rest.to_string()) => {
                    let path = format!("shared/{rest}");
                    let text = (self.file)(&path).ok_or_else(|| fail(format!("shaders/{path}.wgsl is missing")))?;
                    let lines: Vec<&str> = text.lines().collect();
                    self.block(&path, &lines, 0, defines)?;
                }
                "#import" => {}
                "#params" if live => self.out.push_str(if defines.contains_key("IMMEDIATES") {
                    "var<immediate> params: Params;\n"
                } else {
                    "@group(1) @binding(0) var<uniform> params: Params;\n"
                }),
                _ if live => {
                    self.out.push_str(&substitute(line, defines).map_err(fail)?);
                    self.out.push('\n');
                }
                _ => {}
            }
            at += 1;
        }
        if conditions.is_empty() { Ok(()) } else { Err(format!("{name}.wgsl: #if without #endif")) }
    }
}

/// How many lines stand before the `#end` that closes an `#unroll`.
fn matching_end(lines: &[&str]) -> Option<usize> {
    let mut depth = 0;
    for (at, line) in lines.iter().enumerate() {
        match line.split_whitespace().next() {
            Some("#unroll") => depth += 1,
            Some("#end") if depth == 0 => return Some(at),
            Some("#end") => depth -= 1,
            _ => {}
        }
    }
    None
}

fn unroll_range<'l>(text: &'l str, defines: &Defines) -> Result<(&'l str, i64, i64), String> {
    let (counter, range) = text.split_once(" in ").ok_or("#unroll wants `i in A..B`")?;
    let (from, to) = range.split_once("..").ok_or("#unroll wants `i in A..B`")?;
    Ok((counter.trim(), evaluate(from, defines)?, evaluate(to, defines)?))
}

fn substitute(line: &str, defines: &Defines) -> Result<String, String> {
    let mut out = String::with_capacity(line.len());
    let mut rest = line;
    while let Some(start) = rest.find("#{") {
        out.push_str(&rest[..start]);
        let end = rest[start..].find('}').ok_or("#{ without }")? + start;
        out.push_str(&evaluate(&rest[start + 2..end], defines)?.to_string());
        rest = &rest[end + 1..];
    }
    out.push_str(rest);
    Ok(out)
}

/// An integer expression: names, numbers, `+ - * / % == < ( )`.
fn evaluate(text: &str, defines: &Defines) -> Result<i64, String> {
    let mut parser = Expression { rest: text.trim(), defines, whole: text };
    let value = parser.comparison()?;
    if parser.rest.is_empty() { Ok(value) } else { Err(format!("cannot read the expression `{text}`")) }
}

struct Expression<'e> {
    rest: &'e str,
    whole: &'e str,
    defines: &'e Defines,
}

impl Expression<'_> {
    fn eat(&mut self, token: &str) -> bool {
        match self.rest.trim_start().strip_prefix(token) {
            Some(rest) => {
                self.rest = rest.trim_start();
                true
            }
            None => false,
        }
    }

    fn comparison(&mut self) -> Result<i64, String> {
        let left = self.sum()?;
        if self.eat("==") {
            Ok((left == self.sum()?) as i64)
        } else if self.eat("<") {
            Ok((left < self.sum()?) as i64)
        } else {
            Ok(left)
        }
    }

    fn sum(&mut self) -> Result<i64, String> {
        let mut value = self.product()?;
        loop {
            if self.eat("+") {
                value += self.product()?;
            } else if self.eat("-") {
                value -= self.product()?;
            } else {
                return Ok(value);
            }
        }
    }

    fn product(&mut self) -> Result<i64, String> {
        let mut value = self.atom()?;
        loop {
            if self.eat("*") {
                value *= self.atom()?;
            } else if self.eat("/") {
                value = value.checked_div(self.atom()?).ok_or("division by zero")?;
            } else if self.eat("%") {
                value = value.checked_rem(self.atom()?).ok_or("division by zero")?;
            } else {
                return Ok(value);
            }
        }
    }

    fn atom(&mut self) -> Result<i64, String> {
        if self.eat("(") {
            let value = self.comparison()?;
            return if self.eat(")") { Ok(value) } else { Err(format!("`)` missing in `{}`", self.whole)) };
        }
        let rest = self.rest.trim_start();
        let end = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
        let word = &rest[..end];
        self.rest = rest[end..].trim_start();
        match word.parse() {
            Ok(number) => Ok(number),
            Err(_) => {
                self.defines.get(word).copied().ok_or_else(|| format!("`{word}` is not defined in `{}`", self.whole))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn run(text: &'static str, line: &str) -> Result<String, String> {
        let variant = parse_variants(line).unwrap().remove(0);
        expand(&variant, &["IMMEDIATES"], &|name| match name {
            "f" => Some(text),
            "shared/one" => Some("const ONE = 1;"),
            _ => None,
        })
    }

    #[test]
    fn sections_conditions_unrolls_and_imports() {
        let text = "#import one\n#import one\nhead\n#kernel a\n#unroll i in 0..N\n#unroll j in 0..2\nx#{i*2+j}\n#end\n#end\n\
                    #ifdef N\nyes\n#else\nno\n#endif\n#if N == 3\nthree\n#endif\n#params\n#kernel b\nother";
        let out = run(text, "f.a N=2").unwrap();
        assert_eq!(out, "const ONE = 1;\nhead\nx0\nx1\nx2\nx3\nyes\nvar<immediate> params: Params;\n");
        assert_eq!(run(text, "f.b").unwrap(), "const ONE = 1;\nhead\nother\n");
    }

    #[test]
    fn mistakes_name_file_and_line() {
        assert!(run("#kernel a\n\n#{M}", "f.a").unwrap_err().starts_with("f.wgsl:3:"));
        assert!(run("#kernel a\n#ifdef X", "f.a").unwrap_err().contains("#endif"));
        assert!(run("#kernel a", "f.c").unwrap_err().contains("no `#kernel c`"));
        assert!(parse_variants("lonely").is_err());
    }
}
